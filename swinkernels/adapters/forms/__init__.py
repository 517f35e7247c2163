"""Forms of modules unlike Microsoft's block: functions that compute a forward with the op, used only after a trial."""
