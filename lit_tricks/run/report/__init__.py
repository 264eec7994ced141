"""Tables, plots and pages, made from the files of run folders alone."""
