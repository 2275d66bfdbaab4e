"""What a configuration will do, judged before a fleet goes out with it."""
