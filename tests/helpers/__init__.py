"""What the tests of several files need: imported as `tests.helpers.NAME`, by the processes that tests start, too."""
