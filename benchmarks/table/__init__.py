"""The paper's table made again, at any scale, with a record of every figure."""
