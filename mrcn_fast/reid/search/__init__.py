"""The search for the people in one's own images, and the files of features that it reads.

collections.py lists and extracts images, and features.py has the files of features. nearest.py searches
exactly within a memory limit, and index.py by a FAISS index. engines.py writes features for FAISS and for
databases. hits.py writes what was found as text, JSON and
a page. scored.py scores the features of any framework, and commands.py has the commands.
"""
