// A client of the realtime protocol in one file without packages, for Dart 3.7 or newer and Flutter on phones and desktops
// (not the web). `main` prints each word of talk.wav (16 kHz, mono, 16 bit, header of 44 bytes) with its end:
//   dart examples/client.dart talk.wav [ws://HOST:8000/v1/realtime [SECONDS]]      the key comes from VLLM_API_KEY
import 'dart:async';
import 'dart:convert';
import 'dart:io';
import 'dart:math';
import 'dart:typed_data';

const rate = 16000, keep = 300 * rate; // samples: a second, and the audio kept through an outage
const stall = Duration(seconds: 20); // longest silence of a server that has more than 3 s of audio to answer
const audio = {'format': {'type': 'audio/pcm', 'rate': rate}, 'turn_detection': {'type': 'server_vad'}};
const session = {'type': 'transcription', 'progress': true, 'audio': {'input': audio}};
typedef Word = ({String text, double start, double end}); // final; in seconds of the input
Future<void> later(num milliseconds) => Future<void>.delayed(Duration(milliseconds: milliseconds.round()));

class Failure implements Exception {
  Failure(this.message, {this.lost = false}); // lost: a new connection can continue
  final String message;
  final bool lost;
  @override String toString() => message;
}

/// One transcription, over one connection after another. To trust a certificate in an app: `HttpOverrides.global`.
class Transcription {
  Transcription(String url, {this.key, required this.onItem, this.onPartial, this.onState})
      : url = Uri.parse(url.replaceFirst(RegExp(r'/+$'), ''));
  final Uri url; // ws://HOST:8000/v1/realtime
  final String? key;
  final void Function(String transcript, List<Word> words) onItem;
  final void Function(String text)? onPartial; // it may still change
  final void Function(String state, String message)? onState; // listening, waiting and why, lost and which audio

  var _audio = Int16List(0), _kept = 0, _transcribed = 0, _ended = false; // audio from _kept on; how far the server is
  int get _received => _kept + _audio.length;
  bool get _complete => _ended && _audio.length < rate ~/ 1000; // the protocol counts in milliseconds
  /// Seconds of audio that are not transcribed yet. A file should wait while they are many; a microphone cannot.
  double get lag => (_received - max(_transcribed, _kept)) / rate;

  /// Take in samples (16 kHz, mono), at any time.
  void add(Int16List samples) {
    _audio = Int16List(_audio.length + samples.length)..setAll(0, _audio)..setAll(_audio.length, samples);
    final oldest = _received - keep;
    if (oldest > _kept) onState?.call('lost', 'audio from ${_kept / rate} to ${oldest / rate} s is lost');
    _keep(oldest);
  }

  /// No more audio comes: the last words follow.
  void end() => _ended = true;

  void _keep(int position) {
    final count = (position - _kept).clamp(0, _audio.length);
    _audio = Int16List.sublistView(_audio, count);
    _kept += count;
  }

  /// Transcribe until the input has ended. Throws an Exception, also after [patience] seconds without progress.
  Future<void> run([num patience = 120]) async {
    if (!RegExp(r'^wss?://.+/realtime$').hasMatch('$url')) throw Failure('$url: write ws://HOST:8000/v1/realtime');
    if (RegExp(r'[^\x21-\x7e]').hasMatch(key ?? '')) throw Failure('the key has a space, or a character that is not ASCII');
    var failures = 0, before = 0, since = Stopwatch()..start();
    while (!_complete) {
      try {
        final audio = lag > (before > 0 ? 1 : 0); // without audio a connection would only occupy a slot
        audio || _ended ? await _connect() : await later(20);
      } on Failure catch (error) {
        if (!error.lost) rethrow;
        if (_transcribed > before) (failures, before, since) = (0, _transcribed, Stopwatch()..start());
        if (since.elapsedMilliseconds > 1000 * patience) throw Failure('gave up: $error');
        onState?.call('waiting', '$error; trying again');
        await later((500 << min(4, failures++)) * (0.5 + Random().nextDouble()));
      }
    }
  }

  /// One connection, until all is transcribed.
  Future<void> _connect() async {
    final http = HttpClient()..findProxy = null; // at home: no proxy
    final headers = {if (key != null) 'Authorization': 'Bearer $key'};
    late final WebSocket socket;
    try {
      socket = await WebSocket.connect('$url?intent=transcription', headers: headers, customClient: http).timeout(stall);
    } on WebSocketException catch (error) {
      final status = error.httpStatusCode ?? 0, answer = '(HTTP $status)';
      if (status == 401) throw Failure('${key == null ? 'the server wants a key' : 'wrong API key'} $answer');
      throw status < 429 ? Failure('no realtime server $answer') : Failure('the server returned HTTP $status', lost: true);
    } on HandshakeException catch (error) {
      throw Failure('the TLS handshake failed: ${error.osError?.message ?? error.message}');
    } on Exception {
      throw Failure('no server answers', lost: true);
    } finally {
      http.close(force: true); // this does not close an open WebSocket
    }
    final over = Completer<void>(), items = <String, String>{}, origin = _kept;
    void fail(Object error) => over.isCompleted ? null : over.completeError(error);
    void send(String type, [Map<String, Object?> more = const {}]) => socket.add(jsonEncode({'type': type, ...more}));
    var sent = origin, committed = false, heard = Stopwatch()..start();
    double seconds(dynamic time) => origin / rate + (time as num);
    void take(Map<String, dynamic> event) {
      if (event case {'error': {'code': final String code, 'message': final String message}}) {
        throw Failure('$message ($code)', lost: code.startsWith('server_'));
      }
      if (event case {'delta': final String delta, 'item_id': final String item}) items[item] = '${items[item] ?? ''}$delta';
      if (event case {'transcript': final String text, 'words': final List<dynamic> words}) {
        items.remove(event['item_id']);
        onItem(text, [for (final w in words) (text: '${w['word']}', start: seconds(w['start']), end: seconds(w['end']))]);
      }
      if (event.containsKey('content_index')) onPartial?.call(items.values.join(' '));
      if (event case {'audio_end_ms': final int end} when event['type'] != 'input_audio_buffer.speech_stopped') {
        _keep(origin + end * rate ~/ 1000);
        _transcribed = max(_transcribed, origin + ((event['transcribed_ms'] ?? end) as int) * rate ~/ 1000);
      }
    }
    socket.map((message) => take(jsonDecode(message as String) as Map<String, dynamic>)).listen((_) => heard.reset(),
        onError: fail, onDone: () => fail(Failure('connection lost (${socket.closeCode ?? 1006})', lost: true)));
    onState?.call('listening', '');
    send('session.update', {'session': session});
    final timer = Timer.periodic(const Duration(milliseconds: 20), (_) {
      for (; sent < _received && !committed; sent = min(sent + rate, _received)) {
        final piece = _audio.sublist(sent - _kept, min(sent + rate, _received) - _kept);
        send('input_audio_buffer.append', {'audio': base64Encode(Uint8List.sublistView(piece))});
      }
      if (!committed && sent - _transcribed < 3 * rate) heard.reset(); // nothing is owed
      if (_ended && !committed) send('input_audio_buffer.commit');
      committed = _ended;
      if (heard.elapsed > stall) fail(Failure('no answer for ${stall.inSeconds} s', lost: true));
      if (_complete && !over.isCompleted) over.complete();
    });
    await over.future.whenComplete(timer.cancel).whenComplete(() => socket.close().ignore()); // not waiting for the server
  }
}

Never leave(int status, String message) {
  stderr.writeln(message);
  exit(status);
}

void main(List<String> arguments) => runZonedGuarded(() async {
  if (arguments.isEmpty) leave(2, 'usage: dart client.dart talk.wav [ws://HOST:8000/v1/realtime [SECONDS]]');
  stdout.done.catchError((_) => exit(1)).ignore(); // as in: ... | head
  final file = await File(arguments[0]).readAsBytes(), head = ByteData.sublistView(file);
  int field(int at) => head.getUint16(at, Endian.little);
  final known = file.length >= 44 && latin1.decode(file.sublist(36, 40)) == 'data';
  if (!known || field(22) != 1 || field(24) != rate || field(34) != 16) {
    throw Failure('the WAV must be 16 kHz, mono, 16 bit, header 44 bytes: sox FILE -r 16000 -c 1 -b 16 talk.wav');
  }
  final samples = Int16List.sublistView(file.sublist(44, file.length - file.length % 2));
  final transcription = Transcription(arguments.elementAtOrNull(1) ?? 'ws://localhost:8000/v1/realtime',
      key: Platform.environment['VLLM_API_KEY'],
      onItem: (_, words) => words.forEach((w) => stdout.writeln('${w.end.toStringAsFixed(2).padLeft(8)} ${w.text}')),
      onState: (_, message) => message.isEmpty ? null : stderr.writeln(message));
  final finished = transcription.run(num.parse(arguments.elementAtOrNull(2) ?? '120'));
  for (var at = 0; at < samples.length; at += rate ~/ 10) {
    transcription.add(samples.sublist(at, min(at + rate ~/ 10, samples.length)));
    while (transcription.lag > 10) await later(20);
  }
  transcription.end();
  await finished;
  exit(0);
}, (error, _) => leave(1, 'error: ${'$error'.split('\n').first}'));
