"""The service that the tests use, and the SDK as a second way to check results."""
