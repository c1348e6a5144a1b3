/* What happens in the browser alone: what is brought into view, is told to be old, can't be played, or keeps the keyboard. */
window.sotto = {
  place: name => document.querySelector(name),

  /* Scrolls to an element of which no more than a rim is to be seen. */
  bring(element) {
    const top = element?.getBoundingClientRect().top;
    if (top < 0 || top > 0.6 * innerHeight) element.scrollIntoView({ behavior: 'smooth' });
  },

  /* The keyboard goes on where a button was pressed that couldn't keep it while it was disabled or hidden. */
  keep(name) {
    if (document.activeElement === document.body) sotto.place(name)?.focus({ preventScroll: true });
  },

  drawn: work => setTimeout(work, 150),

  thinking() {
    sotto.place('#results').dataset.old = 'again';
    sotto.bring(sotto.place('#results'));
  },

  /* Once nothing runs any more. */
  settled() {
    sotto.drawn(() => {
      sotto.compare();
      sotto.keep('#think');
    });
  },

  /* Tells whether the answer is to what the fields ask now. */
  compare() {
    const card = sotto.place('#asked [data-asked]');
    const options = sotto.place('#options textarea').value.split('\n').map(line => line.trim()).filter(Boolean);
    const next = [sotto.place('#question textarea').value, options, Number(sotto.place('#pauses input[type=number]').value)];
    const same = !card || JSON.stringify(JSON.parse(card.dataset.asked)) === JSON.stringify(next);
    if (same) delete sotto.place('#results').dataset.old;
    else sotto.place('#results').dataset.old = 'changed';
  },

  /* A field was changed, maybe while the model thinks. */
  edited(event) {
    if (!event.target.closest('#question, #options, #pauses')) return;
    sotto.drawn(() => {
      if (sotto.place('#results').dataset.old !== 'again') sotto.compare();
    });
  },

  filming() {
    sotto.chosen();
    sotto.bring(sotto.place('#clip'));
  },

  filmed() {
    sotto.drawn(() => {
      sotto.bring(sotto.place('#notices .s-error') ?? sotto.place('#clip'));
      sotto.keep('#film');
    });
  },

  revealed: () => sotto.drawn(() => sotto.place('#truth .s-truth')?.focus({ preventScroll: true })),

  /* Marks the example that the clip is, or none. */
  chosen(button) {
    for (const each of document.querySelectorAll('#examples button')) each.setAttribute('aria-pressed', each === button);
  },

  /* Hidden plots have no size to be drawn in. */
  redraw() {
    for (const wait of [50, 400]) setTimeout(() => dispatchEvent(new Event('resize')), wait);
  },
};

document.addEventListener('input', sotto.edited);
document.addEventListener('click', sotto.edited); // a slider has a button too

const clipOf = event => (event.target.tagName === 'VIDEO' ? event.target.closest('#clip') : null);
/* Gradio would call it an error of the page. A picture is shown as the poster of the film that it isn't. */
document.addEventListener('error', event => {
  const clip = clipOf(event);
  if (!clip) return;
  event.stopImmediatePropagation();
  const picture = /\.(gif|png|jpe?g|webp|bmp)$/i.test(new URL(event.target.src, location).pathname);
  if (picture) event.target.poster = event.target.src;
  clip.dataset.unplayable = picture ? 'picture' : 'film';
}, true);
document.addEventListener('loadeddata', event => {
  const clip = clipOf(event);
  if (clip) delete clip.dataset.unplayable;
}, true);
