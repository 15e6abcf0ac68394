"""In: a model and images. Out: a compiled or quantized model, and figures of what a model looks at."""
