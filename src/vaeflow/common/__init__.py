"""Files, processes, progress, pictures, and which code makes which output."""
