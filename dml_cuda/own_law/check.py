def check_law(loss):
    pass
