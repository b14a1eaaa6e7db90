"""Rows in bulk: from files of any kind to raw rows, what is alike among them, and on which side of a split they belong.
No torch."""
