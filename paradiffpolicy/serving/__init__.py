"""A policy over the network: the server, and the client that plans like a local policy."""
