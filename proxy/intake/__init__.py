"""From the bytes of a request to a job that may begin: read, priced, limited, admitted."""
