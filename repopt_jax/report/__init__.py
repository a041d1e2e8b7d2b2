"""What is shown of runs: pictures, the report's page, and the quickstart that ends in one."""
