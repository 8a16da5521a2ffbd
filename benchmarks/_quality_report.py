def write_report(work, out):
    raise NotImplementedError
