"""Tables, plots and pages, made only from the files of run folders."""
