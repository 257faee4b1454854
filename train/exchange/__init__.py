"""Networks from and for other projects: `ddm import` and `ddm export`."""
