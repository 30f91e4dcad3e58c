"""Names shared by what launches kernels and the kernels themselves."""

RELU, LEAKY_RELU, SILU = 1, 2, 3
CODES = {None: 0, "relu": RELU, "leaky_relu": LEAKY_RELU, "silu": SILU}
