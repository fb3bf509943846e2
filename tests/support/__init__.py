"""What the tests share: cases, twins of torch.nn, comparisons with stated tolerances."""
