"""Hours of use in minutes: all features at once, epoch after epoch, with a service that keeps failing."""
