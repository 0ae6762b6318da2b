def check(call, batch): raise NotImplementedError
def compute(*a): raise NotImplementedError
