"""Models p(z)p(x|z), one program a file: read them, copy them, edit them."""
