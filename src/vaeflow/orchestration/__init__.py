"""DVC's graph and Prefect: stages, server, console, report."""
