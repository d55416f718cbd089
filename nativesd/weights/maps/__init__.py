"""Names to names: the tables that read and write every published layout."""
