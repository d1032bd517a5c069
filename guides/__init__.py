"""Guides q(z|x), one program a file: read them, copy them, edit them."""
