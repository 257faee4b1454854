"""The mathematics and the file formats of decentralized diffusion; docs/design.md is their map."""
