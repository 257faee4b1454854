"""The runs that come with the program, one YAML each; a package, so that an installed wheel finds them."""
