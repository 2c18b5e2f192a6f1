"""Studies: samplers and checkpoints compared on fresh paired seeds, and a report of them."""
