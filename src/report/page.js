// Values on hover, and the tables of the charts' numbers, both of the data that stand beside each chart.
(function () {
  'use strict';
  var tip = document.getElementById('tip');

  function show(text, event) {
    tip.textContent = text;
    tip.style.display = 'block';
    var box = tip.getBoundingClientRect();
    var x = Math.min(event.clientX + 14, window.innerWidth - box.width - 4);
    var y = event.clientY + 18 + box.height > window.innerHeight ? event.clientY - box.height - 10 : event.clientY + 18;
    tip.style.left = Math.max(4, x) + 'px';
    tip.style.top = Math.max(4, y) + 'px';
  }

  function hide() { tip.style.display = 'none'; }
  document.addEventListener('pointerdown', function (event) { if (!event.target.closest('figure svg')) { hide(); } });

  function number(value) {
    return value === null || value === undefined ? '' : String(Number(Number(value).toPrecision(6)));
  }

  // The point of a curve that is nearest to x; its points are in order.
  function nearest(points, x) {
    var low = 0, high = points.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (points[middle][0] < x) { low = middle; } else { high = middle; }
    }
    return Math.abs(points[low][0] - x) < Math.abs(points[high][0] - x) ? points[low] : points[high];
  }

  function overCurves(data, x, y) {
    var at = data.x, beside = data.y;
    if (x < at.left || x > at.right || y < beside.top || y > beside.bottom) { return null; }
    var value = at.from + (x - at.left) / (at.right - at.left) * (at.to - at.from);
    var lines = data.series.filter(function (series) { return series.points.length > 0; }).map(function (series) {
      var point = nearest(series.points, value);
      return series.name + ': ' + number(point[1]) + '  (' + at.name + ' ' + number(point[0]) + ')';
    });
    return lines.join('\n');
  }

  function overMarks(data, x, y) {
    var hit = data.marks.filter(function (mark) {
      var box = mark.box;
      return x >= box[0] && x <= box[2] && y >= box[1] && y <= box[3];
    })[0];
    return hit ? hit.text : null;
  }

  function row(cells, tag) {
    var line = document.createElement('tr');
    cells.forEach(function (cell) {
      var item = document.createElement(tag);
      item.textContent = cell;
      line.appendChild(item);
    });
    return line;
  }

  function fill(table, data) {
    if (data.series) {
      table.appendChild(row(['curve', data.x.name, data.y.name], 'th'));
      data.series.forEach(function (series) {
        series.points.forEach(function (point) {
          table.appendChild(row([series.name, number(point[0]), number(point[1])], 'td'));
        });
      });
    } else {
      table.appendChild(row([data.unit].concat(data.columns), 'th'));
      data.rows.forEach(function (line) {
        table.appendChild(row([line.name].concat(line.values.map(number)), 'td'));
      });
    }
  }

  document.querySelectorAll('figure[data-chart]').forEach(function (figure) {
    var data = JSON.parse(document.getElementById(figure.getAttribute('data-chart')).textContent);
    var svg = figure.querySelector('svg'), size = svg.viewBox.baseVal;
    function look(event) {
      var box = svg.getBoundingClientRect();
      var x = (event.clientX - box.left) / box.width * size.width, y = (event.clientY - box.top) / box.height * size.height;
      var text = data.series ? overCurves(data, x, y) : overMarks(data, x, y);
      if (text) { show(text, event); } else { hide(); }
    }
    svg.addEventListener('pointermove', look);
    // A finger leaves at once: what it has touched stays until the next touch.
    svg.addEventListener('pointerdown', look);
    svg.addEventListener('pointerleave', function (event) { if (event.pointerType === 'mouse') { hide(); } });
    var details = figure.querySelector('details');
    details.addEventListener('toggle', function () {
      var table = details.querySelector('table');
      if (details.open && table.rows.length === 0) { fill(table, data); }
    });
  });
})();
