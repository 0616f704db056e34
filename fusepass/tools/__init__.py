"""The tools of the command line: explain, verify, doctor, and running somebody's model."""
