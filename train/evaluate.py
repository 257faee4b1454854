def evaluate(config, monolith): pass
