"""Tests of the load generator; they mirror its files. `server` is the small real server they run against."""
