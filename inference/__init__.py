"""In: a model. Out: a compiled or quantized one."""
