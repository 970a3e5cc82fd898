import jakarta.jms.Connection;
import jakarta.jms.DeliveryMode;
import jakarta.jms.MessageConsumer;
import jakarta.jms.MessageProducer;
import jakarta.jms.Queue;
import jakarta.jms.Session;
import jakarta.jms.BytesMessage;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.activemq.ActiveMQConnectionFactory;
import org.apache.activemq.broker.BrokerService;

/**
 * ActiveMQ's own client at work: `ActiveLoad SERVER QUEUE BYTES RECORDS sends|reads|latency|delivery`. Prints one number.
 * `ActiveLoad serve ADDRESS FOLDER` is its broker as it comes, which keeps messages in KahaDB.
 */
public class ActiveLoad {
    public static void main(String[] args) throws Exception {
        if (args[0].equals("serve")) {
            BrokerService broker = new BrokerService();
            broker.setDataDirectory(args[2]);
            broker.setUseJmx(false);
            broker.addConnector(args[1]);
            broker.start();
            broker.waitUntilStopped();
            return;
        }
        ActiveMQConnectionFactory factory = new ActiveMQConnectionFactory(args[0]);
        factory.setWatchTopicAdvisories(false);
        String queue = args[1], mode = args[4];
        byte[] value = new byte[Integer.parseInt(args[2])];
        Arrays.fill(value, (byte) 'x');
        long records = Long.parseLong(args[3]);
        double result = switch (mode) {
            case "sends" -> {
                send(factory, queue, value, records / 10); // what is just in time is compiled by then
                yield send(factory, queue, value, records);
            }
            case "reads" -> read(factory, queue, records);
            default -> one(factory, queue, value, (int) records, mode.equals("delivery"));
        };
        System.out.println("result " + result);
        System.exit(0);
    }

    static BytesMessage message(Session session, byte[] value) throws Exception {
        BytesMessage message = session.createBytesMessage();
        message.writeBytes(value);
        return message;
    }

    /** Persistent messages, each answered, by eight producers. */
    static double send(ActiveMQConnectionFactory factory, String queue, byte[] value, long records) throws Exception {
        AtomicLong left = new AtomicLong(records);
        List<Thread> threads = new ArrayList<>();
        long begun = System.nanoTime();
        for (int i = 0; i < 8; i++) {
            Thread thread = new Thread(() -> {
                try (Connection connection = factory.createConnection()) {
                    connection.start();
                    Session session = connection.createSession(false, Session.AUTO_ACKNOWLEDGE);
                    MessageProducer producer = session.createProducer(session.createQueue(queue));
                    while (left.getAndDecrement() > 0) producer.send(message(session, value));
                } catch (Exception e) {
                    e.printStackTrace();
                    System.exit(1);
                }
            });
            thread.start();
            threads.add(thread);
        }
        for (Thread thread : threads) thread.join();
        return records * 1e9 / (System.nanoTime() - begun);
    }

    static double read(ActiveMQConnectionFactory factory, String queue, long records) throws Exception {
        try (Connection connection = factory.createConnection()) {
            connection.start();
            Session session = connection.createSession(false, Session.AUTO_ACKNOWLEDGE);
            MessageConsumer consumer = session.createConsumer(session.createQueue(queue));
            consumer.receive(30_000);
            long begun = System.nanoTime();
            for (long got = 1; got < records; got++) {
                if (consumer.receive(10_000) == null) throw new IllegalStateException(got + " of " + records);
            }
            return (records - 1) * 1e9 / (System.nanoTime() - begun);
        }
    }

    /** One in flight, µs, median: persistent until answered, or transient until a consumer has it. */
    static double one(ActiveMQConnectionFactory factory, String queue, byte[] value, int records, boolean delivery) throws Exception {
        try (Connection connection = factory.createConnection()) {
            connection.start();
            Session sends = connection.createSession(false, Session.AUTO_ACKNOWLEDGE);
            Session takes = connection.createSession(false, Session.AUTO_ACKNOWLEDGE);
            Queue to = sends.createQueue(queue);
            MessageProducer producer = sends.createProducer(to);
            producer.setDeliveryMode(delivery ? DeliveryMode.NON_PERSISTENT : DeliveryMode.PERSISTENT);
            MessageConsumer consumer = delivery ? takes.createConsumer(to) : null;
            long[] took = new long[records];
            for (int i = -1_000; i < records; i++) {
                long begun = System.nanoTime();
                producer.send(message(sends, value));
                if (delivery && consumer.receive(10_000) == null) throw new IllegalStateException("not delivered");
                if (i >= 0) took[i] = System.nanoTime() - begun;
            }
            Arrays.sort(took);
            return took[records / 2] / 1_000.0;
        }
    }
}
