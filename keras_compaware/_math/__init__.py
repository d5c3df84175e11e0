"""Array mathematics shared by compressors and regularizers (private)."""
