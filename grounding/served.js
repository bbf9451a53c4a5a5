// Says what to do when a page is opened as a file, where a browser loads no module: so this script is none.
if (location.protocol === 'file:') {
  const box = document.getElementById('message');
  box.textContent = 'This page must be served: run "python -m http.server 8000 --bind 127.0.0.1" in the root '
    + 'of the repository, then open http://127.0.0.1:8000/grounding/' + location.pathname.split('/').pop();
  box.hidden = false;
  for (const panel of document.querySelectorAll('.panel')) panel.hidden = true;
}
