"""The roof: driver, rounds, pools, placement, checkpoints and the command line."""
