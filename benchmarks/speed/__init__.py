"""How fast the program is, on a CPU and on a GPU, beside its peers and the machine's limit."""
