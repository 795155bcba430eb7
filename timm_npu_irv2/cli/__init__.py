"""The command line: option tables, their parser, and how a script starts and ends."""
