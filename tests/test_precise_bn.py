"""PreciseBN("""
