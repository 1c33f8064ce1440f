"""The commands of the command line: one file for each area, one `add_NAME` and one `NAME_command` for each."""
