def add_batch(p): pass
