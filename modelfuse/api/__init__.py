"""The Python API: functions that take settings as arguments and return results."""
