def write(table): pass
