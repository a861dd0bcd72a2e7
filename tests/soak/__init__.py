"""Hours of use in minutes: everything at once, epoch after epoch, against a service that keeps failing."""
