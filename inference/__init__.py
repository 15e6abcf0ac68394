"""A checkpoint comes in; a compiled or quantized model goes out."""
