"""The console command.

Everything is built here and nowhere else; what is built knows nothing of configs.
"""
