"""Names to names: the tables that read and write every published layout, and what a checkpoint is by them."""
