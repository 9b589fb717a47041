"""The feature cache, the contract between the phases: its format, writer, reader and checks."""
