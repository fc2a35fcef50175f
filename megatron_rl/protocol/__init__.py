"""Protocol: the requests, responses and payloads that trainer and engines exchange."""
