// From a folder, browsers fetch no pages for the excerpts below search results.
DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol !== 'file:';
