"""Mathematics of the search: numpy in, numpy out. Knows no files and no ranks."""
