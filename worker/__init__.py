"""Leases runs and executes them in workspaces: engines, images, live machines, log pumping."""
