"""The tools of the command line: explain, verify, doctor, bench, and running the user's model."""
